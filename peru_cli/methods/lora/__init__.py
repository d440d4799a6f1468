"""Common coordinates for the updates of several LoRAs."""
