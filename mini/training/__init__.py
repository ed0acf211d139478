"""From tasks and models to runs."""
