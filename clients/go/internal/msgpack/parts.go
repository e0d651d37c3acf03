package msgpack

// IsNil reports whether a body begins with nil.
func IsNil(body []byte) bool {
	return len(body) > 0 && body[0] == 0xc0
}

// IsMap reports whether a body begins with a map.
func IsMap(body []byte) bool {
	head, err := readHead(body, 0)
	return err == nil && head.class == classMap
}

// IsMapOrNil reports whether a body begins with a map or with nil.
func IsMapOrNil(body []byte) bool {
	return IsMap(body) || IsNil(body)
}

// Split returns views of the values of a body that was scanned and that is an array of at most as many; false for any other.
func Split(body []byte, most int) ([]Raw, bool) {
	head, err := readHead(body, 0)
	if err != nil || head.class != classArray || head.size > uint64(most) {
		return nil, false
	}
	parts := make([]Raw, head.size)
	at := head.at
	for index := range parts {
		end := skip(body, at)
		parts[index] = Raw(body[at:end:end])
		at = end
	}
	return parts, true
}
