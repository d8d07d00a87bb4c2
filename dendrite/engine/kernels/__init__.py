"""Kernels of a step, attention aside, in Triton and CUDA C++. Only what runs on a CUDA device imports them.

Every kernel of a step's chain starts while the one before it still runs, and waits for it before it reads or writes
anything that is not constant (programmatic dependent launch). Each one must wait, so that "the one before has ended"
means that all before have ended.
"""
