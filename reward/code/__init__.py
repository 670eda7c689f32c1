"""Programs: `blocks` finds the one that an answer offers, `answer` runs it in the sandbox, `cases` compares what came of it."""
