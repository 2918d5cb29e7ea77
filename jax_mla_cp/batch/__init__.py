"""From a step's requests to its arrays, on the host: NumPy, no device.

`zigzag` divides the new tokens over the cp ranks, `layout` lays them out, `arrays` are the result and `packing` its form in transit.
"""
