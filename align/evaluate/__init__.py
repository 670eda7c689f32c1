"""What is measured on a policy: accuracy, agreement of sampler and learner, benchmarks, and whether a model can be trained."""
