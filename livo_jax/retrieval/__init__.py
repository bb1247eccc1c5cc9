"""The retriever: which values a prompt is for."""
