"""Mathematical answers: `answer` scores them, by `text` and `value` where that is certain, and by `job`, in a worker, where it takes algebra."""
