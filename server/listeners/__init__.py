"""The coordinator's listeners: who may speak to them, what one peer may take, what operators may ask."""
