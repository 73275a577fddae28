"""An owner's node: policy, ledger, private training, sealing and opening."""
