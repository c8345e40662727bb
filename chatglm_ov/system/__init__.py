"""What the operating system tells and gives: memory, processors, pages."""
