"""C++ kernels for the CPU, and how they are built and loaded."""
