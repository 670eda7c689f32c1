"""What a recipe would take on a cluster: where everything goes, how much memory it needs and how long a step takes."""
