server             = false
leave_on_terminate = true
