"""Teachers: what scores the student's tokens."""
