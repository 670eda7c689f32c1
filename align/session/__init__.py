"""What a stage needs around it: Ray, engines, signals, steps and their checkpoints, the run's directory."""
