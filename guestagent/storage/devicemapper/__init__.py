"""Device-mapper without libdm, udev or cookies: ioctls, typed table lines, device lifetimes."""
