package relay

import "github.com/kptrace/kptrace/trace"

func pathToPB(p *trace.Path) *Path {
	return &Path{
		Predicted: p.Predicted, Number: int64(p.Number), Packet: p.Packet, Reply: p.Reply,
		Tuple: tupleToPB(p.Tuple), Left: tupleToPB(p.Left), Ctid: p.CTID, Hops: each(p.Hops, ref(hopToPB)),
		Probability: p.Probability, Incomplete: p.Incomplete, Note: p.Note,
	}
}

func pathFromPB(p *Path) trace.Path {
	return trace.Path{
		Predicted: p.GetPredicted(), Number: int(p.GetNumber()), Packet: p.GetPacket(), Reply: p.GetReply(),
		Tuple: tupleFromPB(p.GetTuple()), Left: tupleFromPB(p.GetLeft()), CTID: p.GetCtid(),
		Hops: each(p.GetHops(), hopFromPB), Probability: p.GetProbability(),
		Incomplete: p.GetIncomplete(), Note: p.GetNote(),
	}
}

func hopToPB(h *trace.Hop) *Hop {
	return &Hop{
		Kind: string(h.Kind), Hook: h.Hook, Table: h.Table, Chain: h.Chain, Rule: h.Rule, Handle: h.Handle,
		Text: h.Text, Purpose: h.Purpose, Verdict: h.Verdict, Target: h.Target,
		Changes: each(h.Changes, ref(changeToPB)), Probability: h.Probability, Time: timeToPB(h.Time),
		In: h.In, Out: h.Out, PhysIn: h.PhysIn, PhysOut: h.PhysOut, Mark: h.Mark, Source: uint32(h.Source),
	}
}

func hopFromPB(h *Hop) trace.Hop {
	return trace.Hop{
		Kind: trace.HopKind(h.GetKind()), Hook: h.GetHook(), Table: h.GetTable(), Chain: h.GetChain(),
		Rule: h.GetRule(), Handle: h.GetHandle(), Text: h.GetText(), Purpose: h.GetPurpose(),
		Verdict: h.GetVerdict(), Target: h.GetTarget(), Changes: each(h.GetChanges(), changeFromPB),
		Probability: h.GetProbability(), Time: timeFromPB(h.GetTime()),
		In: h.GetIn(), Out: h.GetOut(), PhysIn: h.GetPhysIn(), PhysOut: h.GetPhysOut(),
		Mark: h.GetMark(), Source: trace.SourceID(h.GetSource()),
	}
}

func changeToPB(c *trace.Change) *Change {
	return &Change{Field: c.Field, Before: c.Before, After: c.After}
}

func changeFromPB(c *Change) trace.Change {
	return trace.Change{Field: c.GetField(), Before: c.GetBefore(), After: c.GetAfter()}
}
