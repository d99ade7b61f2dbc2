"""Caption, image, round-trip and retrieval metrics, and the intervals they are reported with."""
