"""The engine that streams aligned tiles of tensors through CPU threads or CUDA."""
