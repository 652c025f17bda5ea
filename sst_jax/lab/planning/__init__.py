"""Planning: described hardware, ahead-of-time compilation for it, and counting what a program does."""
