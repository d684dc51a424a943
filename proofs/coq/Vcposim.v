(* The theory on a finite probability space, for any number of outcomes (I : finType), any dimension d and any ordered
   field R. Names of variables are those of the Python side: mu the measure, w the weights, r the rewards, g the scores.
   Layer 3 adds two things to layer 2: batches of any size as a product space, and no solver to trust. *)
From mathcomp Require Import all_ssreflect all_algebra.
From mathcomp Require Import ring.
Set Implicit Arguments. Unset Strict Implicit. Unset Printing Implicit Defensive.
Import GRing.Theory Num.Theory Order.Theory.
Local Open Scope ring_scope.

(* ---- expectation ------------------------------------------------------------------------------------------------ *)
Section Expectation.
Variables (R : realFieldType) (I : finType) (mu : I -> R).

Definition E (f : I -> R) : R := \sum_i mu i * f i.

Lemma eqE f h : f =1 h -> E f = E h.
Proof. by move=> fh; apply: eq_bigr => i _; rewrite fh. Qed.
Lemma ED f h : E (fun i => f i + h i) = E f + E h.
Proof. by rewrite /E -big_split; apply: eq_bigr => i _ /=; ring. Qed.
Lemma EZ c f : E (fun i => c * f i) = c * E f.
Proof. by rewrite /E mulr_sumr; apply: eq_bigr => i _; ring. Qed.
Lemma E_sum (J : finType) (f : J -> I -> R) : E (fun i => \sum_j f j i) = \sum_j E (f j).
Proof. by rewrite /E exchange_big; apply: eq_bigr => i _; rewrite mulr_sumr. Qed.
Lemma E_ge0 f : (forall i, 0 <= mu i) -> (forall i, 0 <= f i) -> 0 <= E f.
Proof. by move=> mu0 f0; apply: sumr_ge0 => i _; rewrite mulr_ge0. Qed.

Hypothesis mu1 : \sum_i mu i = 1.
Lemma Ec c : E (fun=> c) = c.
Proof. by rewrite /E -mulr_suml mu1 mul1r. Qed.

Definition var f := E (fun i => (f i - E f) ^+ 2).
Lemma varE f : var f = E (fun i => f i ^+ 2) - E f ^+ 2.
Proof.
rewrite /var; set m := E f.
rewrite (@eqE _ (fun i => f i ^+ 2 + (- (2%:R * m) * f i + m ^+ 2))); last by move=> i; ring.
by rewrite !ED EZ Ec -/m; ring.
Qed.
End Expectation.

Section Vectors.
Variables (R : realFieldType) (I : finType) (d : nat) (mu : I -> R).
Implicit Types X : I -> 'I_d -> R.

Definition norm2 (x : 'I_d -> R) : R := \sum_j x j ^+ 2.
Lemma norm2_ge0 x : 0 <= norm2 x.
Proof. by apply: sumr_ge0 => j _; rewrite sqr_ge0. Qed.
Lemma norm2Z a x : norm2 (fun j => a * x j) = a ^+ 2 * norm2 x.
Proof. by rewrite /norm2 mulr_sumr; apply: eq_bigr => j _; ring. Qed.

(* tr Cov X = E ||X - E X||^2 *)
Definition trcov X : R := E mu (fun i => norm2 (fun j => X i j - E mu (X^~ j))).

Hypothesis mu1 : \sum_i mu i = 1.
Lemma trcov_coordinates X : trcov X = \sum_j var mu (X^~ j).
Proof. by rewrite /trcov /norm2 E_sum. Qed.
Lemma trcovE X : trcov X = E mu (fun i => norm2 (X i)) - norm2 (fun j => E mu (X^~ j)).
Proof.
rewrite trcov_coordinates /norm2 E_sum -sumrB.
by apply: eq_bigr => j _; rewrite varE.
Qed.
End Vectors.

(* ---- T1, T2, T5, T11: the off-policy gradient and its baselines -------------------------------------------------- *)
Section Gradient.
Variables (R : realFieldType) (I : finType) (d : nat).
Variables (mu w r : I -> R) (g : I -> 'I_d -> R).
Hypothesis mu1 : \sum_i mu i = 1.

(* one sample's contribution with baseline b *)
Definition est b i j : R := w i * (r i - b) * g i j.
(* a_i = w_i^2 ||s_i||^2, the OPOB's weight *)
Definition a i : R := w i ^+ 2 * norm2 (g i).
Definition D : R := E mu a.
Definition opob : R := E mu (fun i => a i * r i) / D.
Definition mean_ws j : R := E mu (fun i => w i * g i j).
Definition mean_wrs j : R := E mu (fun i => w i * r i * g i j).

Lemma E_est b j : E mu (fun i => est b i j) = mean_wrs j - b * mean_ws j.
Proof.
rewrite (@eqE _ _ _ _ (fun i => w i * r i * g i j + (- b) * (w i * g i j))).
  by rewrite ED EZ /mean_wrs /mean_ws; ring.
by move=> i; rewrite /est; ring.
Qed.

Lemma E_norm2_est b : E mu (fun i => norm2 (est b i)) =
  E mu (fun i => a i * r i ^+ 2) - 2%:R * b * E mu (fun i => a i * r i) + b ^+ 2 * D.
Proof.
rewrite (@eqE _ _ _ _ (fun i => a i * r i ^+ 2 + ((- (2%:R * b)) * (a i * r i) + b ^+ 2 * a i))).
  by rewrite !ED !EZ -/D; ring.
by move=> i; rewrite norm2Z /a; ring.
Qed.

(* any weights: T5, and T11 with w / L in the place of w *)
Definition spread : R := D - norm2 mean_ws.
Definition inner : R := \sum_j mean_wrs j * mean_ws j.
Definition best : R := (E mu (fun i => a i * r i) - inner) / spread.

Lemma norm2_mean b : norm2 (fun j => E mu (fun i => est b i j)) =
  norm2 mean_wrs - 2%:R * b * inner + b ^+ 2 * norm2 mean_ws.
Proof.
rewrite /norm2 /inner !mulr_sumr -sumrB -big_split; apply: eq_bigr => j _ /=.
by rewrite E_est; ring.
Qed.

Theorem min_variance_gap b : spread != 0 ->
  trcov mu (est b) - trcov mu (est best) = (b - best) ^+ 2 * spread.
Proof.
move=> s0; rewrite !trcovE // !E_norm2_est !norm2_mean.
have -> : D = spread + norm2 mean_ws by rewrite /spread subrK.
by rewrite /best; field.
Qed.

(* mean squared distance to any vector G *)
Definition mse (G : 'I_d -> R) b : R := E mu (fun i => norm2 (fun j => est b i j - G j)).
Definition best_mse (G : 'I_d -> R) : R := (E mu (fun i => a i * r i) - \sum_j mean_ws j * G j) / D.

Lemma mseE G b : mse G b = E mu (fun i => norm2 (est b i))
  - 2%:R * (\sum_j mean_wrs j * G j - b * \sum_j mean_ws j * G j) + norm2 G.
Proof.
rewrite /mse (@eqE _ _ _ _ (fun i => norm2 (est b i) + ((- 2%:R) * (\sum_j G j * est b i j) + norm2 G))).
  rewrite !ED EZ Ec // (E_sum _ (fun j i => G j * est b i j)) (eq_bigr (fun j => G j * (mean_wrs j - b * mean_ws j))); last first.
    by move=> j _; rewrite EZ E_est.
  rewrite mulr_sumr -sumrB (eq_bigr (fun j => mean_wrs j * G j - b * (mean_ws j * G j))); last by move=> j _; ring.
  by rewrite sumrB; ring.
move=> i; rewrite /norm2 mulr_sumr -!big_split; apply: eq_bigr => j _ /=; ring.
Qed.

Theorem min_mse_gap G b : D != 0 -> mse G b - mse G (best_mse G) = (b - best_mse G) ^+ 2 * D.
Proof. by move=> D0; rewrite !mseE !E_norm2_est /best_mse; field. Qed.

(* from here on E[w s] = 0, as for untouched importance weights *)
Hypothesis balanced : forall j, E mu (fun i => w i * g i j) = 0.

Theorem baseline_unbiased b j : E mu (fun i => est b i j) = E mu (fun i => w i * r i * g i j).
Proof. by rewrite E_est /mean_ws balanced mulr0 subr0. Qed.

Corollary is_unbiased (pi : I -> R) b j : (forall i, mu i * w i = pi i) ->
  E mu (fun i => est b i j) = \sum_i pi i * (r i * g i j).
Proof. by move=> e; rewrite baseline_unbiased; apply: eq_bigr => i _; rewrite -e; ring. Qed.

Lemma spreadE : spread = D.
Proof. by rewrite /spread /norm2 big1 ?subr0 // => j _; rewrite /mean_ws balanced expr0n. Qed.
Lemma bestE : best = opob.
Proof. by rewrite /best spreadE /inner big1 ?subr0 // => j _; rewrite /mean_ws balanced mulr0. Qed.

Theorem opob_gap b : D != 0 -> trcov mu (est b) - trcov mu (est opob) = (b - opob) ^+ 2 * D.
Proof. by move=> D0; have := @min_variance_gap b; rewrite spreadE bestE; apply. Qed.

Lemma D_ge0 : (forall i, 0 <= mu i) -> 0 <= D.
Proof. by move=> mu0; apply: E_ge0 => // i; rewrite mulr_ge0 ?norm2_ge0 ?sqr_ge0. Qed.

Theorem opob_optimal b : (forall i, 0 <= mu i) -> D != 0 -> trcov mu (est opob) <= trcov mu (est b).
Proof. by move=> mu0 D0; rewrite -subr_ge0 opob_gap // mulr_ge0 ?sqr_ge0 ?D_ge0. Qed.

Theorem opob_unique b : D != 0 -> (trcov mu (est b) == trcov mu (est opob)) = (b == opob).
Proof.
by move=> D0; rewrite -[LHS]subr_eq0 opob_gap // mulf_eq0 sqrf_eq0 (negPf D0) orbF subr_eq0.
Qed.

(* T5: the exact bias of truncation *)
Lemma minE (x c : R) : Num.min x c = x - Num.max (x - c) 0.
Proof. by rewrite minElt maxElt subr_lt0; case: ifP => _; ring. Qed.

Theorem truncation_bias c b j :
  E mu (fun i => Num.min (w i) c * (r i - b) * g i j) - E mu (fun i => w i * r i * g i j)
  = - E mu (fun i => Num.max (w i - c) 0 * (r i - b) * g i j).
Proof.
rewrite -(baseline_unbiased b) (@eqE _ _ _ _ (fun i => est b i j + (-1) * (Num.max (w i - c) 0 * (r i - b) * g i j))).
  by rewrite ED EZ; ring.
by move=> i; rewrite minE /est; set m := Num.max _ _; ring.
Qed.

(* T6: a baseline made of independent data t *)
Theorem independent_baseline_unbiased (T : finType) (nu b : T -> R) j : \sum_t nu t = 1 ->
  \sum_i \sum_t (mu i * nu t) * est (b t) i j = E mu (fun i => w i * r i * g i j).
Proof.
move=> nu1; rewrite exchange_big /= (eq_bigr (fun t => nu t * E mu (fun i => w i * r i * g i j))).
  by rewrite -mulr_suml nu1 mul1r.
by move=> t _; rewrite -(baseline_unbiased (b t)) /E mulr_sumr; apply: eq_bigr => i _; ring.
Qed.

(* T13: for binary rewards, any advantage A of the reward gives the gradient's direction *)
Theorem binary_advantage (A1 A0 : R) j : (forall i, r i = 0 \/ r i = 1) ->
  E mu (fun i => w i * (if r i == 1 then A1 else A0) * g i j) = (A1 - A0) * E mu (fun i => w i * r i * g i j).
Proof.
move=> bin; rewrite (@eqE _ _ _ _ (fun i => (A1 - A0) * (w i * r i * g i j) + A0 * (w i * g i j))).
  by rewrite ED !EZ balanced mulr0 addr0.
move=> i; case: (bin i) => ->; rewrite ?eqxx ?[0 == 1]eq_sym ?oner_eq0 /=; ring.
Qed.

(* T14: one baseline a coordinate *)
Definition Dj j : R := E mu (fun i => (w i * g i j) ^+ 2).
Definition best_j j : R := E mu (fun i => (w i * g i j) ^+ 2 * r i) / Dj j.
Theorem coordinate_gap (b : 'I_d -> R) : (forall j, Dj j != 0) ->
  trcov mu (fun i j => est (b j) i j) - trcov mu (fun i j => est (best_j j) i j) = \sum_j (b j - best_j j) ^+ 2 * Dj j.
Proof.
move=> D0; rewrite !trcov_coordinates -sumrB; apply: eq_bigr => j _.
rewrite !varE // !baseline_unbiased.
have q x : E mu (fun i => est x i j ^+ 2) = E mu (fun i => (w i * g i j) ^+ 2 * r i ^+ 2)
    - 2%:R * x * E mu (fun i => (w i * g i j) ^+ 2 * r i) + x ^+ 2 * Dj j.
  rewrite (@eqE _ _ _ _ (fun i => (w i * g i j) ^+ 2 * r i ^+ 2
      + ((- (2%:R * x)) * ((w i * g i j) ^+ 2 * r i) + x ^+ 2 * (w i * g i j) ^+ 2))).
    by rewrite !ED !EZ -/(Dj j); ring.
  by move=> i; rewrite /est; ring.
by rewrite !q /best_j; field.
Qed.
End Gradient.

Section Weights.
Variables (R : realFieldType) (I : finType) (d : nat) (mu w : I -> R).
Hypothesis mu1 : \sum_i mu i = 1.
Hypothesis w1 : E mu w = 1.

(* T4 *)
Definition chi2 : R := E mu (fun i => (w i - 1) ^+ 2).
Theorem Ew2_chi2 : E mu (fun i => w i ^+ 2) = 1 + chi2.
Proof.
have -> : chi2 = E mu (fun i => w i ^+ 2 + ((- 2%:R) * w i + 1)) by apply: eqE => i; ring.
by rewrite !ED EZ Ec // w1; ring.
Qed.

(* T14: w - 1 as a control variate of any contribution X *)
Definition lambda (X : I -> 'I_d -> R) j : R := E mu (fun i => (w i - 1) * X i j) / chi2.
Theorem control_variate_gap (X : I -> 'I_d -> R) : chi2 != 0 ->
  trcov mu (fun i j => X i j - lambda X j * (w i - 1)) = trcov mu X - chi2 * norm2 (lambda X).
Proof.
move=> c0; rewrite !trcov_coordinates /norm2 mulr_sumr -sumrB; apply: eq_bigr => j _.
rewrite !varE //; set l := lambda X j.
have mean0 : E mu (fun i => w i - 1) = 0 by rewrite (ED _ w (fun=> -1)) Ec // w1 subrr.
have -> : E mu (fun i => X i j - l * (w i - 1)) = E mu (X^~ j).
  have -> : E mu (fun i => X i j - l * (w i - 1)) = E mu (fun i => X i j + (- l) * (w i - 1)) by apply: eqE => i; ring.
  by rewrite ED EZ mean0 mulr0 addr0.
rewrite (@eqE _ _ _ _ (fun i => X i j ^+ 2 + ((- (2%:R * l)) * ((w i - 1) * X i j) + l ^+ 2 * (w i - 1) ^+ 2))); last first.
  by move=> i; ring.
by rewrite !ED !EZ -/chi2 /l /lambda; field.
Qed.
End Weights.

(* tabular softmax scores average to zero, so `balanced` can be met *)
Lemma softmax_score (R : realFieldType) n (pi : 'I_n -> R) (j : 'I_n) :
  \sum_i pi i = 1 -> \sum_i pi i * ((i == j)%:R - pi j) = 0.
Proof.
move=> pi1; rewrite (eq_bigr (fun i => pi i * (i == j)%:R + (- pi j) * pi i)); last first.
  by move=> i _; rewrite mulrBr mulNr [pi j * _]mulrC.
rewrite big_split /= -mulr_sumr pi1 (bigD1 j) //= eqxx big1 => [|i /negPf ->]; last by rewrite mulr0.
by rewrite /=; ring.
Qed.

(* ---- T9: leverage ------------------------------------------------------------------------------------------------ *)
Section Leverage.
Variables (R : realFieldType) (A B u ai ri : R).   (* A = E[a], B = E[a R]; sample i: weight ai, reward ri, mass u *)
Hypotheses (A0 : A != 0) (others0 : A - u * ai != 0).
Let b := B / A.
Let b_others := (B - u * ai * ri) / (A - u * ai).

Theorem leverage_identity : ri - b = (1 - u * ai / A) * (ri - b_others).
Proof. by rewrite /b /b_others; field; rewrite A0 others0. Qed.

Theorem leverage_vanishing : 0 < u -> 0 < ai -> 0 < A - u * ai ->
  u ^+ 2 * ai * (ai * (ri - b) ^+ 2) <= (A - u * ai) ^+ 2 * (ri - b_others) ^+ 2.
Proof.
move=> u0 a0 o0; rewrite leverage_identity exprMn.
have Ap : 0 < A by rewrite -(subrK (u * ai) A) addr_gt0 // mulr_gt0.
have -> : u ^+ 2 * ai * (ai * ((1 - u * ai / A) ^+ 2 * (ri - b_others) ^+ 2)) =
   (u * ai / A) ^+ 2 * ((A - u * ai) ^+ 2 * (ri - b_others) ^+ 2) by field.
apply: ler_pimull; first by rewrite mulr_ge0 ?sqr_ge0.
rewrite expr_le1 ?divr_ge0 ?mulr_ge0 ?ltW //.
by rewrite ltr_pdivr_mulr // mul1r -subr_gt0.
Qed.
End Leverage.

(* ---- T3: the effective sample size -------------------------------------------------------------------------------- *)
Section ESS.
Variables (R : realFieldType) (I : finType).
Implicit Types w : I -> R.
Definition S1 w : R := \sum_i w i.
Definition S2 w : R := \sum_i w i ^+ 2.
Definition ess w : R := S1 w ^+ 2 / S2 w.
Let N : R := #|I|%:R.

Lemma S2_eq0 w : (S2 w == 0) = [forall i, w i == 0].
Proof.
rewrite psumr_eq0 => [|i _]; last exact: sqr_ge0.
apply/allP/forallP => [h i | h i _]; last by rewrite sqrf_eq0 h.
by have := h i (mem_index_enum i); rewrite sqrf_eq0.
Qed.
Lemma S2_ge0 w : 0 <= S2 w.
Proof. by apply: sumr_ge0 => i _; rewrite sqr_ge0. Qed.
Lemma S2_gt0 w : S2 w != 0 -> 0 < S2 w.
Proof. by move=> s; rewrite lt0r s S2_ge0. Qed.

Theorem ess_scale c w : c != 0 -> ess (fun i => c * w i) = ess w.
Proof.
move=> c0; rewrite /ess.
have -> : S1 (fun i => c * w i) = c * S1 w by rewrite /S1 mulr_sumr.
have -> : S2 (fun i => c * w i) = c ^+ 2 * S2 w.
  by rewrite /S2 mulr_sumr; apply: eq_bigr => i _; ring.
by rewrite exprMn -mulf_div divff ?mul1r // sqrf_eq0.
Qed.

(* Cauchy-Schwarz, with what it leaves out *)
Lemma spread_of_weights w : \sum_i (N * w i - S1 w) ^+ 2 = N * (N * S2 w - S1 w ^+ 2).
Proof.
transitivity (\sum_i (N ^+ 2 * w i ^+ 2 + (- (2%:R * N * S1 w)) * w i + S1 w ^+ 2)).
  by apply: eq_bigr => i _; ring.
rewrite !big_split /= sumr_const -[X in _ + X]mulr_natl -/N -!mulr_sumr -/(S1 w) -/(S2 w).
by ring.
Qed.

Lemma N_gt0 w : S2 w != 0 -> 0 < N.
Proof.
by rewrite S2_eq0 => /forallPn[i _]; rewrite /N ltr0n; apply/card_gt0P; exists i.
Qed.

Theorem ess_le_N w : S2 w != 0 -> ess w <= N.
Proof.
move=> s0; rewrite ler_pdivr_mulr ?S2_gt0 // -subr_ge0 -(pmulr_rge0 _ (N_gt0 s0)) -spread_of_weights.
by apply: sumr_ge0 => i _; rewrite sqr_ge0.
Qed.

Theorem ess_eq_N w : S2 w != 0 -> (ess w == N) = [forall i, forall k, w i == w k].
Proof.
move=> s0; have Nn0 : N != 0 by rewrite lt0r_neq0 ?(N_gt0 s0).
have -> : (ess w == N) = (\sum_i (N * w i - S1 w) ^+ 2 == 0).
  rewrite spread_of_weights mulf_eq0 (negPf Nn0) /= subr_eq0 /ess.
  by rewrite -(inj_eq (mulIf s0)) divfK // eq_sym.
rewrite psumr_eq0 => [|i _]; last exact: sqr_ge0.
apply/allP/forallP => [h i | h i _].
  apply/forallP => k; have e l : N * w l = S1 w.
    by apply/eqP; rewrite -subr_eq0 -sqrf_eq0; apply: (h l); rewrite mem_index_enum.
  by apply/eqP/(mulfI Nn0); rewrite !e.
rewrite sqrf_eq0 subr_eq0 /S1 (eq_bigr (fun=> w i)) ?sumr_const ?mulr_natl ?eqxx //.
by move=> k _; move/forallP: (h i) => /(_ k)/eqP.
Qed.

Lemma pairs_of_weights w : S1 w ^+ 2 - S2 w = \sum_i w i * (S1 w - w i).
Proof.
by rewrite expr2 {1}/S1 mulr_suml /S2 -sumrB; apply: eq_bigr => i _; ring.
Qed.

Lemma le_S1 w i : (forall k, 0 <= w k) -> w i <= S1 w.
Proof. by move=> w0; rewrite /S1 (bigD1 i) //= ler_addl; apply: sumr_ge0 => k _. Qed.

Theorem ess_ge_1 w : (forall i, 0 <= w i) -> S2 w != 0 -> 1 <= ess w.
Proof.
move=> w0 s0; rewrite ler_pdivl_mulr ?S2_gt0 // mul1r -subr_ge0 pairs_of_weights.
by apply: sumr_ge0 => i _; rewrite mulr_ge0 // subr_ge0 le_S1.
Qed.

(* equality exactly when a single sample has weight *)
Theorem ess_eq_1 w : (forall i, 0 <= w i) -> S2 w != 0 ->
  (ess w == 1) = [exists i, forall k, (k != i) ==> (w k == 0)].
Proof.
move=> w0 s0.
have -> : (ess w == 1) = (\sum_i w i * (S1 w - w i) == 0).
  by rewrite -pairs_of_weights subr_eq0 /ess -(inj_eq (mulIf s0)) divfK // mul1r.
rewrite psumr_eq0 => [|i _]; last by rewrite mulr_ge0 // subr_ge0 le_S1.
apply/allP/existsP => [h | [i /forallP h] k _].
  move: s0; rewrite S2_eq0 => /forallPn[i wi]; exists i; apply/forallP => k; apply/implyP => ki.
  move: (h i); rewrite mem_index_enum => /(_ isT); rewrite mulf_eq0 (negPf wi) /= /S1 (bigD1 i) //= addrC addKr.
  by rewrite psumr_eq0 // => /allP/(_ k); rewrite mem_index_enum ki => /(_ isT).
have [->|ki] := eqVneq k i; last by have := h k; rewrite ki => /eqP ->; rewrite mul0r eqxx.
rewrite /S1 (bigD1 i) //= big1 ?addr0 ?subrr ?mulr0 // => l li.
by apply/eqP; have := h l; rewrite li.
Qed.
End ESS.

(* ---- batches: B independent draws, any B --------------------------------------------------------------------------- *)
Section Batches.
Variables (R : realFieldType) (I : finType) (mu : I -> R) (B : nat).
Hypothesis mu1 : \sum_i mu i = 1.
Notation draws := {ffun 'I_B -> I}.
Definition P (f : draws) : R := \prod_k mu (f k).

Lemma P1 : \sum_f P f = 1.
Proof. by rewrite /P -(bigA_distr_bigA (fun _ : 'I_B => mu)) /=; apply: big1 => k _. Qed.

(* the batch f with draw k replaced by i *)
Definition resample (k : 'I_B) (f : draws) (i : I) : draws := [ffun l => if l == k then i else f l].
Definition ignores k (h : draws -> R) := forall f i, h (resample k f i) = h f.

Lemma P_resample k f i : P (resample k f i) * mu (f k) = P f * mu i.
Proof.
rewrite /P (bigD1 k) //= [in RHS](bigD1 k) //= ffunE eqxx.
rewrite (eq_bigr (fun l => mu (f l))); first by rewrite mulrAC [mu i * _]mulrC mulrAC.
by move=> l /negPf lk; rewrite ffunE lk.
Qed.

(* Drawing sample k afresh changes no expectation: (f, i) -> (f with i at k, f k) permutes the pairs and keeps their law. *)
Lemma E_resample k F : E P F = E P (fun f => E mu (fun i => F (resample k f i))).
Proof.
pose swap (p : draws * I) := (resample k p.1 p.2, p.1 k).
have swapK : involutive swap.
  by case=> f i; congr pair; [apply/ffunP => l; rewrite !ffunE; case: eqP => [->|] | rewrite ffunE eqxx].
transitivity (\sum_p P p.1 * mu p.2 * F p.1).
  rewrite /E -(pair_bigA _ (fun f i => P f * mu i * F f)) /=.
  by apply: eq_bigr => f _; rewrite -[LHS]mul1r -mu1 mulr_suml; apply: eq_bigr => i _; ring.
rewrite (reindex_inj (inv_inj swapK)) /E /= -(pair_bigA _ (fun f i => P (resample k f i) * mu (f k) * F (resample k f i))) /=.
apply: eq_bigr => f _; rewrite mulr_sumr; apply: eq_bigr => i _.
by rewrite P_resample; ring.
Qed.

Lemma E_indep k h x : ignores k h -> E P (fun f => h f * x (f k)) = E P h * E mu x.
Proof.
move=> hk; rewrite (E_resample k) [RHS]mulrC -[RHS]EZ; apply: eqE => f.
by rewrite mulrC -EZ; apply: eqE => i; rewrite hk ffunE eqxx.
Qed.

Lemma E_coord k x : E P (fun f : draws => x (f k)) = E mu x.
Proof.
rewrite (@eqE _ _ _ _ (fun f : draws => 1 * x (f k))); last by move=> f; rewrite mul1r.
by rewrite E_indep // Ec ?P1 // mul1r.
Qed.

Lemma ignores_coord k l (x : I -> R) : l != k -> ignores k (fun f : draws => x (f l)).
Proof. by move=> lk f i; rewrite ffunE (negPf lk). Qed.

(* T7 *)
Lemma E_wsum c x : E P (fun f : draws => \sum_k c k * x (f k)) = S1 c * E mu x.
Proof. by rewrite E_sum /S1 mulr_suml; apply: eq_bigr => k _; rewrite EZ E_coord. Qed.

Theorem var_wsum c x : var P (fun f : draws => \sum_k c k * x (f k)) = S2 c * var mu x.
Proof.
pose y i := x i - E mu x.
have Ey : E mu y = 0 by rewrite /y (ED _ x (fun=> - E mu x)) Ec // subrr.
rewrite /var E_wsum (@eqE _ _ _ _ (fun f : draws => \sum_k c k * (\sum_l c l * (y (f l) * y (f k))))).
  rewrite E_sum /S2 mulr_suml; apply: eq_bigr => k _.
  rewrite EZ E_sum (bigD1 k) //= big1 => [|l lk]; last by rewrite EZ (E_indep y (ignores_coord y lk)) Ey; ring.
  by rewrite EZ (E_coord k (fun i => y i * y i)) addr0 mulrA -expr2.
move=> f; have -> : \sum_k c k * x (f k) - S1 c * E mu x = \sum_k c k * y (f k).
  by rewrite /S1 mulr_suml -sumrB; apply: eq_bigr => k _; rewrite /y; ring.
rewrite expr2 mulr_suml; apply: eq_bigr => k _.
by rewrite -mulrA; congr (_ * _); rewrite mulr_sumr; apply: eq_bigr => l _; rewrite mulrC -mulrA.
Qed.

Theorem var_mean x : (B > 0)%N -> var P (fun f : draws => (\sum_k x (f k)) / B%:R) = var mu x / B%:R.
Proof.
move=> B0; have Bn0 : B%:R != 0 :> R by rewrite pnatr_eq0 -lt0n.
transitivity (var P (fun f : draws => \sum_k B%:R^-1 * x (f k))).
  by apply: eqE => f; congr ((_ - _) ^+ 2); [|apply: eqE => h]; rewrite mulr_suml; apply: eq_bigr => k _; rewrite mulrC.
by rewrite (var_wsum (fun=> B%:R^-1)) /S2 sumr_const card_ord -mulr_natl; field.
Qed.

(* T4: under fixed weights c, B draws are worth ess c of them *)
Theorem var_weighted_mean c x : S1 c != 0 -> S2 c != 0 ->
  var P (fun f : draws => (\sum_k c k * x (f k)) / S1 c) = var mu x / ess c.
Proof.
move=> c1 c2; transitivity (var P (fun f : draws => \sum_k (c k / S1 c) * x (f k))).
  by apply: eqE => f; congr ((_ - _) ^+ 2); [|apply: eqE => h]; rewrite mulr_suml; apply: eq_bigr => k _; ring.
rewrite (var_wsum (fun k => c k / S1 c)) /ess.
have -> : S2 (fun k => c k / S1 c) = S2 c / S1 c ^+ 2 by rewrite /S2 mulr_suml; apply: eq_bigr => k _; field.
by field; rewrite c1 c2.
Qed.
End Batches.

(* ---- T6: baselines made from the batch -------------------------------------------------------------------------------- *)
Section InBatch.
Variables (R : realFieldType) (I : finType) (d B : nat) (mu w r : I -> R) (g : I -> 'I_d -> R).
Hypothesis mu1 : \sum_i mu i = 1.
Hypothesis balanced : forall j, E mu (fun i => w i * g i j) = 0.
Hypothesis B0 : (B > 0)%N.
Notation draws := {ffun 'I_B -> I}.
Notation PB := (@P R I mu B).
Let Bn0 : B%:R != 0 :> R. Proof. by rewrite pnatr_eq0 -lt0n. Qed.

(* the batch gradient, sample k with baseline b k *)
Definition batch (b : 'I_B -> draws -> R) j (f : draws) : R := (\sum_k w (f k) * (r (f k) - b k f) * g (f k) j) / B%:R.
Definition grad j : R := E mu (fun i => w i * r i * g i j).

Lemma E_batch b c j : (forall k, E PB (fun f : draws => w (f k) * (r (f k) - b k f) * g (f k) j) = c) -> E PB (batch b j) = c.
Proof.
move=> h; rewrite (@eqE _ _ _ _ (fun f : draws => B%:R^-1 * \sum_k w (f k) * (r (f k) - b k f) * g (f k) j)); last first.
  by move=> f; rewrite /batch mulrC.
by rewrite EZ E_sum (eq_bigr (fun=> c)) // sumr_const card_ord -[c *+ B]mulr_natl mulrA mulVf // mul1r.
Qed.

Theorem loo_unbiased b j : (forall k, ignores k (b k)) -> E PB (batch b j) = grad j.
Proof.
move=> bk; apply: E_batch => k.
rewrite (@eqE _ _ _ _ (fun f : draws => w (f k) * r (f k) * g (f k) j + (-1) * (b k f * (w (f k) * g (f k) j)))).
  by rewrite ED EZ (E_coord mu1 k (fun i => w i * r i * g i j)) (E_indep mu1 (fun i => w i * g i j) (bk k)) balanced mulr0
    mulr0 addr0.
by move=> f /=; ring.
Qed.

Definition inbatch_mean (k : 'I_B) (f : draws) : R := (\sum_l r (f l)) / B%:R.
Theorem inbatch_shrinks j : E PB (batch inbatch_mean j) = (1 - B%:R^-1) * grad j.
Proof.
apply: E_batch => k; rewrite (@eqE _ _ _ _ (fun f : draws => w (f k) * r (f k) * g (f k) j
    + (- B%:R^-1) * (\sum_l r (f l) * (w (f k) * g (f k) j)))); last first.
  by move=> f; rewrite /inbatch_mean -mulr_suml /=; set s := \sum_l _; ring.
rewrite ED EZ (E_coord mu1 k (fun i => w i * r i * g i j)) E_sum (bigD1 k) //= big1.
  rewrite (E_coord mu1 k (fun i => r i * (w i * g i j))) (@eqE _ _ _ _ (fun i => w i * r i * g i j)).
    by rewrite addr0 /grad; ring.
  by move=> i; ring.
by move=> l lk; rewrite (E_indep mu1 (fun i => w i * g i j) (ignores_coord r lk)) balanced mulr0.
Qed.

(* leave-one-out OPOB, as one formula of the others *)
Definition loo_opob (k : 'I_B) (f : draws) : R :=
  (\sum_(l | l != k) a w g (f l) * r (f l)) / (\sum_(l | l != k) a w g (f l)).
Lemma loo_opob_ignores k : ignores k (loo_opob k).
Proof. by move=> f i; congr (_ / _); apply: eq_bigr => l /negPf lk; rewrite !ffunE lk. Qed.
Corollary loo_opob_unbiased j : E PB (batch loo_opob j) = grad j.
Proof. by apply: loo_unbiased => k; apply: loo_opob_ignores. Qed.
End InBatch.

(* ---- T8: the step size ---------------------------------------------------------------------------------------------------- *)
Section Step.
Variables (R : realFieldType) (G2 V L : R).   (* |grad|^2, tr Cov, smoothness *)
Hypotheses (G0 : 0 < G2) (V0 : 0 <= V) (L0 : 0 < L).
Definition gain eta : R := eta * G2 - L / 2%:R * eta ^+ 2 * (G2 + V).
Definition eta_star : R := G2 / (L * (G2 + V)).
Let GV : G2 + V != 0. Proof. by rewrite lt0r_neq0 // ltr_paddr. Qed.
Let Ln0 : L != 0. Proof. exact: lt0r_neq0. Qed.

Theorem step_gap eta : gain eta_star - gain eta = L / 2%:R * (G2 + V) * (eta - eta_star) ^+ 2.
Proof. by rewrite /gain /eta_star; field; rewrite GV Ln0. Qed.

Theorem step_ess V1 e : 0 < e -> V = V1 / e -> eta_star = L^-1 * (e / (e + V1 / G2)).
Proof.
move=> e0 VE; have [en0 Gn0] := (lt0r_neq0 e0, lt0r_neq0 G0).
have nz : e * G2 + V1 != 0.
  have -> : e * G2 + V1 = e * (G2 + V) by rewrite VE; field.
  by rewrite mulf_neq0.
by rewrite /eta_star VE; field; rewrite Gn0 nz Ln0 en0.
Qed.
End Step.

Lemma linear_regime (R : realFieldType) (e k : R) : 0 < e -> 0 < k ->
  e / (e + k) <= e / k /\ (e <= k -> e / (2%:R * k) <= e / (e + k)).
Proof.
move=> e0 k0; have ek : 0 < e + k by rewrite addr_gt0.
split; first by rewrite ler_pmul2l // lef_pinv ?posrE // ler_addr ltW.
by move=> le; rewrite ler_pmul2l // lef_pinv ?posrE ?mulr_gt0 ?ltr0n // mulr_natl mulr2n ler_add2r.
Qed.

Theorem expected_descent (R : realFieldType) (I : finType) d (mu : I -> R) (X : I -> 'I_d -> R) (L eta : R) :
  \sum_i mu i = 1 -> let G j := E mu (X^~ j) in
  E mu (fun i => eta * (\sum_j G j * X i j) - L / 2%:R * eta ^+ 2 * norm2 (X i)) = gain (norm2 G) (trcov mu X) L eta.
Proof.
move=> mu1 G; rewrite (@eqE _ _ _ _ (fun i => eta * (\sum_j G j * X i j) + (- (L / 2%:R * eta ^+ 2)) * norm2 (X i))).
  rewrite ED !EZ trcovE // -/G E_sum (eq_bigr (fun j => G j ^+ 2)) => [|j _]; last by rewrite EZ expr2.
  by rewrite -/(norm2 G) /gain; ring.
by move=> i; ring.
Qed.

(* ---- T15: descent efficiency of any estimate, biased or not ----------------------------------------------------------------- *)
Section Descent.
Variables (R : realFieldType) (S I Q L : R).   (* |grad|^2, <grad, E X>, E |X|^2, smoothness *)
Hypotheses (S0 : 0 < S) (Q0 : 0 < Q) (L0 : 0 < L).
Definition efficiency : R := I * I / (S * Q).
Let Sn0 : S != 0. Proof. exact: lt0r_neq0. Qed.
Let Qn0 : Q != 0. Proof. exact: lt0r_neq0. Qed.
Let Ln0 : L != 0. Proof. exact: lt0r_neq0. Qed.

Theorem descent_gap eta :
  efficiency * S / (2%:R * L) - (eta * I - L / 2%:R * eta ^+ 2 * Q) = L / 2%:R * Q * (eta - I / (L * Q)) ^+ 2.
Proof. by rewrite /efficiency; field; rewrite Sn0 Qn0 Ln0. Qed.

Theorem shrink_gap kappa :
  kappa ^+ 2 * Q - 2%:R * kappa * I + S - (1 - efficiency) * S = Q * (kappa - I / Q) ^+ 2.
Proof. by rewrite /efficiency; field; rewrite Sn0 Qn0. Qed.
End Descent.

(* ---- witnesses -------------------------------------------------------------------------------------------------------------- *)
Section Witnesses.
Variable R : realFieldType.
Definition two (x y : R) (i : 'I_2) := if i == ord0 then x else y.
Let sum2 (f : 'I_2 -> R) : \sum_i f i = f ord0 + f (lift ord0 ord0).
Proof. by rewrite big_ord_recl big_ord1. Qed.

(* T5: mu = (1/3, 2/3), pi = (2/3, 1/3), so w = (2, 1/2); the softmax score of action 0; cap 1 *)
Definition mu5 := two (1 / 3%:R) (2%:R / 3%:R).
Definition w5 := two 2%:R (1 / 2%:R).
Definition g5 := two (1 / 3%:R) (- (2%:R / 3%:R)).
Theorem truncation_biased : E mu5 (fun i => w5 i * g5 i) = 0 /\ E mu5 (fun i => Num.min (w5 i) 1 * g5 i) = - (1 / 9%:R).
Proof.
rewrite /E !sum2 /mu5 /w5 /g5 /two /=; split; first by field.
by rewrite min_r ?ler1n // min_l ?ler_pdivr_mulr ?ltr0n // ?mul1r ?ler1n //; field.
Qed.

(* T11: on policy, two outcomes of length 1 and 2 *)
Definition mu11 := two (1 / 2%:R) (1 / 2%:R).
Definition g11 := two (1 / 2%:R) (- (1 / 2%:R)).
Definition L11 := two 1 2%:R.
Theorem length_biased : E mu11 g11 = 0 /\ E mu11 (fun i => g11 i / L11 i) = 1 / 8%:R.
Proof. by rewrite /E !sum2 /mu11 /g11 /L11 /two /=; split; field. Qed.
End Witnesses.
