// Package readme runs the README's examples as they stand, so that what people copy works.
package readme
