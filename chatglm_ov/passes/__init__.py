"""What is rewritten in a graph when it is loaded."""
