"""Trial calls of a transformers model: what its modules receive, where its tokens go, which weights it reads."""
