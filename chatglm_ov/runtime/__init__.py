"""From a converted folder to a compiled model and its requests."""
