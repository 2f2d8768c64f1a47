"""The families of released models, one file each; a file joins by calling `register_family`.

`common` holds what several of them share.
"""
