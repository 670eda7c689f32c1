"""How new weights travel from a learner to the rollout workers: through Ray's object store, as one broadcast, or in files."""
