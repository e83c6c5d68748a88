"""The layouts in which raw image pairs lie on disk, each a plug-in behind one small protocol."""
