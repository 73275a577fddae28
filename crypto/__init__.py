"""Encryption, masks, key agreement, signatures, certificates and sealed files."""
