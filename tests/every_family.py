"""The benches of all families other than the first four, by name."""

from families import MORE
from image_benches import IMAGES

EVERY = MORE | IMAGES
