"""The network behind one seam: our own on a CPU, MindFormers' on Ascend, and the weights that fill either."""
