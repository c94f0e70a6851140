"""What is added to veRL's configuration, and what is refused."""
