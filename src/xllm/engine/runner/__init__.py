"""From a step plan to its result: batch building, forward, sampling. Torch-free; maths is behind ops."""
