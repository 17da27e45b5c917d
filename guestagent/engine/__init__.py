"""What is mounted, who uses it, and how it comes and goes as a transaction."""
