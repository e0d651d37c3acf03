package wire

import "encoding/binary"

// firstCapacity is how much memory an incomplete frame takes at first.
const firstCapacity = 1024

// A Decoder splits a stream of bytes into frames.
//
// However the bytes are divided, the result is the same. A header is checked as soon as it is complete, so the body of an invalid
// frame is never kept. Memory grows with the bytes received, not with the announced length, and the work is linear.
//
// The fields can be changed between frames; a frame whose length was accepted stays accepted. After a Fault the Decoder must not
// be used.
type Decoder struct {
	// Receiver is the side that reads.
	Receiver Side
	// Limit is the largest accepted length.
	Limit uint32
	// Extensions are the kinds accepted beside those that are always there.
	Extensions Extension
	// MaxItem is the largest length of an ITEM; 0 means no further limit.
	MaxItem uint32

	data     []byte // to be parsed: either what was fed, or a complete partial
	partial  []byte // an incomplete frame
	need     int    // bytes of partial that are needed before it is parsed again; 0 without one
	accepted bool   // the length of the frame at hand was accepted, perhaps under another limit
}

// Buffered returns the number of bytes of an incomplete frame.
func (d *Decoder) Buffered() int {
	if d.need > 0 {
		return len(d.partial)
	}
	return len(d.data)
}

// Feed adds bytes, which must not change until Next has returned false. All frames before them must have been taken.
func (d *Decoder) Feed(data []byte) {
	if d.need == 0 {
		d.data = data
		return
	}
	d.partial = append(d.grown(len(data)), data...)
	if len(d.partial) >= d.need {
		d.data, d.partial, d.need = d.partial, nil, 0
	}
}

// grown returns partial with room for more bytes: twice the size, but not more than the frame needs.
func (d *Decoder) grown(more int) []byte {
	wanted := len(d.partial) + more
	if wanted <= cap(d.partial) {
		return d.partial
	}
	return append(make([]byte, 0, max(wanted, min(2*wanted, d.need))), d.partial...)
}

// Next returns the next frame, or false if more bytes are needed. The error is a Fault.
func (d *Decoder) Next() (Frame, bool, *Fault) {
	if d.need > 0 {
		return Frame{}, false, nil
	}
	if len(d.data) < lengthSize {
		d.keep(lengthSize)
		return Frame{}, false, nil
	}
	length := binary.BigEndian.Uint32(d.data)
	if !d.accepted {
		if fault := checkLength(length, d.Limit); fault != nil {
			return Frame{}, false, fault
		}
		d.accepted = true
	}
	if len(d.data) < HeaderSize {
		d.keep(HeaderSize)
		return Frame{}, false, nil
	}
	if fault := d.checkHeader(length); fault != nil {
		return Frame{}, false, fault
	}
	end := lengthSize + int(length)
	if len(d.data) < end {
		d.keep(end)
		return Frame{}, false, nil
	}
	frame := parse(d.data[:end:end])
	d.data = d.data[end:]
	d.accepted = false
	return frame, true, nil
}

// keep stores the beginning of a frame until there are as many bytes as needed. An idle connection keeps nothing.
func (d *Decoder) keep(need int) {
	if len(d.data) > 0 {
		d.partial = append(make([]byte, 0, max(len(d.data), min(need, firstCapacity))), d.data...)
		d.need = need
	}
	d.data = nil
}

func checkLength(length, limit uint32) *Fault {
	if length < MinLength {
		return &Fault{ProtocolError, "length is below 64"}
	}
	if length > limit {
		return &Fault{FrameTooLarge, "frame is larger than allowed here"}
	}
	return nil
}

// checkHeader checks a complete header in the order of zcp1.md, section 5.4.
func (d *Decoder) checkHeader(length uint32) *Fault {
	if d.data[4] != Version {
		return &Fault{ProtocolError, "version is not 1"}
	}
	rule := &rules[d.data[5]]
	if rule.sentTo&d.Receiver == 0 || rule.partOf&^d.Extensions != 0 {
		return &Fault{ProtocolError, "this kind of frame is not allowed here"}
	}
	if d.data[6] != 0 || d.data[7] != 0 {
		return &Fault{ProtocolError, "flags are set"}
	}
	isOnStream := binary.BigEndian.Uint32(d.data[8:]) != 0
	if rule.stream != onAny && isOnStream != (rule.stream == onStream) {
		return &Fault{ProtocolError, "stream does not match the kind"}
	}
	if Kind(d.data[5]) == Item && d.MaxItem > 0 && length > d.MaxItem {
		return &Fault{FrameTooLarge, "item is larger than allowed here"}
	}
	return nil
}
