"""What a model is: its shape, its modules, and what it becomes by compression."""
