"""What is measured, and what is told of it."""
