"The package comes before torch: it says how the threads of torch wait."

import vader_nb  # noqa: F401
