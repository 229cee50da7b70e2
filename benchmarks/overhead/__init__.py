"""CPU time that serving costs beside the model, a token and a step, with an engine that computes nothing."""
