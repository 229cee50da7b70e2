"""What serving costs beside the model: CPU time a streamed token and a step, with an engine that computes nothing."""
