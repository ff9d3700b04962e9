"""The parts that decoders are composed of. Each is small, pure, and knows nothing of requests."""
