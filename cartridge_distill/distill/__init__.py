"""What a step does: the teacher, the loss, who writes what, checks, memory, state."""
