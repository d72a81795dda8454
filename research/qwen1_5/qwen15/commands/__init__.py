"""What a user starts: each command's own file."""
