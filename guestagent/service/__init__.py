"""One handler for each request; the only place where an exception becomes an error reply."""
