"""Tasks: what is asked, how it is demonstrated, and what counts as right, one task in a file."""
