"""Search spaces, initialisation and strategies for NNI: the heavy-ball and Nesterov spaces of section 9.

The spaces are not part of this release; this package reserves the import name.
"""
