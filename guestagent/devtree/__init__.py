"""A private /dev for a container: exactly the devices that it may see."""
