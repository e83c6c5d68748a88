"""CVFT: the model, the transport, the loss and the exact retrieval of cross-view geo-localization, in pure PyTorch."""
