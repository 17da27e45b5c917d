"""What can be seen of a running agent: its log, its metrics, and how an earlier agent ended."""
