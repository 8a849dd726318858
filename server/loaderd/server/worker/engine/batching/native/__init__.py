"""What steps compute between their matrix products on a CPU, in kernels compiled where they run.

torch computes it as some thirty operators a layer, each of which costs more than its arithmetic
where rows are few. Without a C compiler nothing is missing but speed: forward.py and
attention_kernels.py of the folder above compute the same.
"""
