"""What can be done with models and files outside a run."""
