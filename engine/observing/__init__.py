"""What happens in an open store, for who looks on: progress as a stream, events, statistics."""
