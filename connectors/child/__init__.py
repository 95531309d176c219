"""Singer taps and Airbyte sources as children. Start at source.py; process.py confines them."""
