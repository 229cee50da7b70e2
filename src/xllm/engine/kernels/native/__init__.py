"""Backend over the C++ kernels in `native/`: built beforehand, opened here through ctypes. No torch."""
